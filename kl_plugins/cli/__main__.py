"""`python -m kl_plugins.cli`."""

from kl_plugins.cli import main

main()
