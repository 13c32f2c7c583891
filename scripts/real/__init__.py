"""What IAMA saves on a real model in English: SmolLM2-135M-Instruct on two cores. `make real` runs it.

Read `study` first: it lists the units of the study and runs those that lack. A unit trains one policy with one seed and
measures it (`unit`); what it leaves is one small file of numbers in docs/results/real, which is committed. `page`
writes docs/results/real.md from the units that are there, by what their files say (`measured`) and its tables
(`tables`). `model` makes the policy's folder, `prompts` the questions, `gold` judges answers, `proxies` fits the reward
models that select.
"""
