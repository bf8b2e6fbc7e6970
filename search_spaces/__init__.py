"""Search spaces, one per file. A file holds

HYPOTHESIS  what the search is to find out, in a sentence or two
BASE        settings that differ from the defaults, by dotted name
TRIALS      the default budget
COST        what to expect, in words
SAMPLER     optional: the default sampler, where it is not tpe
domains()   the searched settings and their Ray Tune domains; Ray is imported inside, so that listing spaces is instant
points()    instead of domains(): a list of proposals, each a dict of the same settings, tried in order (sampler grid)

Drop a file in this folder and `python -m steerheal.search --list` shows it; `--space PATH.py` takes one from elsewhere.
"""
