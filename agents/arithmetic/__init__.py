"""The embedded team: three small models that reason about integer arithmetic.

`expressions` and `wording` say which problems exist and refuse the rest, `scratchpad` is the notation the models
were trained on, `sampling` draws problems and steps, `roles` puts it behind the Role contract.
"""
