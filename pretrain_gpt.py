"""Pre-train a GPT: Megatron's own loop, with learning-rate path switching. Started by torchrun, srun or python."""

from megatron_lrpath.training.pretrain import main

if __name__ == "__main__":
    main()
