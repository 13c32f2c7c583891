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
