"""`kl-plugins scoreboard`: the KL gradients of every framework that is at hand, measured on the same work.

`frameworks` runs each one's own functions, `worker` measures one framework in a process of its own, `language_model`
trains the model of the second half, `command` puts it together and `pages` writes it down.
"""
