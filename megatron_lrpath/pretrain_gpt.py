"""The training entry point without a checkout: `torchrun … -m -- megatron_lrpath.pretrain_gpt --plan …`."""

from megatron_lrpath.training.pretrain import main

if __name__ == "__main__":
    main()
