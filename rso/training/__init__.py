"""The three trainers: supervised fine-tuning, the pairwise ranker, and the policy.

`steps` fixes beforehand what every optimiser step consists of, `loading` brings the model and
`adapters` what alone is trained of it, `base` runs the steps on `transformers.Trainer`, and
`selection` keeps the best checkpoint; `sft`, `ranker` and `policy` bring their rows and losses.
"""
