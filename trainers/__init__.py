"""Training: non-linear GRPO on TRL, PEFT and DeepSpeed; adapters and their export."""
