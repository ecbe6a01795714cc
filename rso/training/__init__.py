"""The three trainers: supervised fine-tuning, the pairwise ranker, and the policy.

`steps` fixes beforehand what every optimiser step consists of, `base` runs the steps on
`transformers.Trainer`; `sft`, `ranker` and `policy` bring their rows and losses.
"""
