"""Train a SentencePiece tokenizer on text files. `--help` lists the flags."""

from megatron_nexus.commands.train_tokenizer import main

if __name__ == "__main__":
    main()
