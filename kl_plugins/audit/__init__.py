"""`kl-plugins audit`: bias and variance of every KL term's gradient on your own model, reference and prompts.

`command` is the command line, `data` reads prompts and rollouts, `model` samples and scores with Transformers,
`configurations` lists the terms (ours and the hosts' own), `gradients` turns scored completions into gradients,
`sketch` keeps those small, `statistics` compares them with the targets, `pages` writes the report.
"""
