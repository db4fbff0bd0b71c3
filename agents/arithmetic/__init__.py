"""The embedded team's side of the role contract: three small models solve problems of integer arithmetic.

`expressions` and `wording` define the problems that the team accepts. `scratchpad` is the notation that the models were
trained on. `sampling` draws random problems for training and tests. `oracle` gives the right reply to each prompt.
`roles` holds the three roles.
"""
