"""The three trainers: supervised fine-tuning, the pairwise ranker, and the policy.

`steps` plans the optimiser steps before training. `loading` prepares the model, and `adapters` adds
low-rank adapters to it. `base` runs the steps on `transformers.Trainer`. `selection` keeps the best
checkpoint. `sft`, `ranker` and `policy` define the rows and losses of the three trainers.
"""
