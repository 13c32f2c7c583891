"""Train a meta-aligned adapter: `deepspeed --num_gpus 2 train_iama.py --config configs/demo.yaml`."""

from iama.cli.train import main

if __name__ == "__main__":
    main()
