"""What the `patch` functions of transformers and diffusers share.

replacements.py      what stands at a site, for which models; the report
functions.py         replacements of rotary functions
forms.py             forms of functions, and which form a function has
reference_checks.py  random arguments for reference checks
style.py             how a function pairs, reads its tables and rounds
norms.py             RMS norms that wait for the rotation
sources.py           changed definitions of methods
"""
