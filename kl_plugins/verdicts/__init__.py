"""What a whole training configuration does about the KL, for `kl-plugins explain`. Loads neither torch nor a host.

`settings` reads it, `runs` makes a run of it, `host_terms` and `traps` are what is known of the hosts, and
`verdict.explain_run` puts these together.
"""
