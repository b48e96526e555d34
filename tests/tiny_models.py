"""Five architectures, so small that a step takes milliseconds, of sizes that two ranks and three cannot share evenly."""

TINY = {
    "gpt2": {"n_layer": 2, "n_embd": 33, "n_head": 3, "n_positions": 37, "vocab_size": 102},  # tied, learned positions
    "llama": {
        "num_hidden_layers": 3,
        "hidden_size": 35,
        "intermediate_size": 71,
        "vocab_size": 103,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 14,
        "tie_word_embeddings": False,
    },
    "opt": {
        "num_hidden_layers": 2,
        "hidden_size": 33,
        "ffn_dim": 67,
        "word_embed_proj_dim": 33,
        "vocab_size": 107,
        "num_attention_heads": 3,
        "max_position_embeddings": 41,
        "pad_token_id": 1,
    },
    "gpt_neox": {
        "num_hidden_layers": 2,
        "hidden_size": 40,
        "intermediate_size": 77,
        "vocab_size": 101,
        "num_attention_heads": 5,
        "max_position_embeddings": 41,
    },
    "qwen2": {  # grouped queries, tied
        "num_hidden_layers": 2,
        "hidden_size": 42,
        "intermediate_size": 61,
        "vocab_size": 113,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
}


def tiny_configuration(name):
    """The transformers configuration of one of TINY, without dropout."""
    from transformers import CONFIG_MAPPING

    given = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} | TINY[name]
    return CONFIG_MAPPING[name](**given)


def recipe_of(case, global_batch_size):
    """The recipe of a case: an architecture of TINY in a precision."""
    from clm_dist import recipe

    train = {"max_steps": 1, "global_batch_size": global_batch_size, "mixed_precision": case["mixed_precision"]}
    data = {
        "source": "none.jsonl",
        "prepared_dir": "none",
        "tokenizer_vocab_size": 300,
        "eval_fraction": 0,
        "block_size": 8,
    }
    return recipe.build({"run_dir": "none", "data": data, "model": {"type": case["architecture"]}, "train": train})
