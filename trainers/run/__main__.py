"""`deepspeed --module trainers.run --config ...`: training without the repository's `train_iama.py`."""

from trainers.run.train import main

if __name__ == "__main__":
    main()
