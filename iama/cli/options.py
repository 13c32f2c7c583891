"""Options that several commands share: how a policy is sampled, which reward scores, and where."""

from __future__ import annotations

from typing import Annotated

import typer

Temperature = Annotated[float | None, typer.Option(help="Else that of iama.json, or 1.")]
TopP = Annotated[float | None, typer.Option(help="Else that of iama.json, or 1 (all tokens).")]
TopK = Annotated[int | None, typer.Option(help="Else that of iama.json, or 0 (all tokens).")]
MinP = Annotated[float | None, typer.Option(help="Else that of iama.json, or 0 (all tokens).")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Else that of iama.json, or 1 (none).")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text. Repeatable.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Else that of iama.json, or 128.")]
ChatTemplate = Annotated[str | None, typer.Option(help="A .jinja file, for a tokenizer without a chat template.")]
RewardFlag = Annotated[str | None, typer.Option(help="Classifier directory, or file.py:function.")]
Head = Annotated[str | None, typer.Option(help="Output of a classifier with several, by label.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that the model's folder brings; else it is refused.")
]
Ray = Annotated[
    str | None,
    typer.Option(metavar="[ADDRESS]", help="Work on a Ray cluster: HOST:PORT of its head, else one that Ray finds."),
]
RayWorkers = Annotated[
    int | None, typer.Option(help="With --ray: else one for each GPU, or without GPUs one for each node.")
]
RayGpusPerWorker = Annotated[float | None, typer.Option(help="With --ray: else 1, or 0 where there are none.")]
VllmOptions = Annotated[
    list[str] | None,
    typer.Option("--vllm", help="With --engine vllm, what vLLM is told: gpu_memory_utilization=0.5. Repeatable."),
]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=c. Repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead, for scripts.")]

# Groups of help. ----------------------------------------------------------------------------------------

TRAIN, ANSWER, EVALUATE, POOLS, MACHINE = (
    "Train",
    "Answer and serve",
    "Evaluate",
    "Samples and rewards",
    "This machine",
)
COMMANDS = (TRAIN, ANSWER, EVALUATE, POOLS, MACHINE)
"""Groups of commands, in order."""
_OF_OPTIONS = {
    "What is read": "config overrides pools prompts subset split column max_prompts prompt spec pool base",
    "Policy": "policy policies adapter name chat_template system_prompt plain trust_remote_code",
    "Reward and method": "reward rewards head spec_file criterion criteria trained method methods tuning proxy_column "
    "gold_column report_column max_budget",
    "Sampling": "n temperature top_p top_k min_p repetition_penalty stop max_new_tokens seed num_prompts num_samples",
    "Training": "value_head rank ridge max_steps learning_rate held_out",
    "Server that samples (--engine openai)": "url model api_key_env concurrency timeout_s num_retries leave_out",
    "Where it runs": "engine vllm device dtype batch_size devices shard ray ray_workers ray_gpus_per_worker "
    "deepspeed_config host port",
    "What is written": "out replace merge base_model reward_name evaluation push_to_hub private compare combine "
    "as_json dry_run show",
}
PANELS = {name: panel for panel, names in _OF_OPTIONS.items() for name in names.split()}
"""The group of each option, by the name of its parameter."""
