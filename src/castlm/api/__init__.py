"""The work of a command as one call: `castlm.prune`, `train`, `finetune`, `evaluate` and `pack`.

Each module has the options of its command as a dataclass, which the command line reads too, and the function. Options
have the same names, defaults and errors in both.
"""
