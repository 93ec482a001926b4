"""What every host adapter shares: the options, the rules about them, their flags, and the recorder of what is logged.

No host is imported here, so that options are read, checked and explained without one.
"""
