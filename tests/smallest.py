"""The configuration of training tests: `configs/tiny.py` with the smallest sizes that work."""

from configs import tiny


def get_config():
    config = tiny.get_config()
    decoder = config.model.language_config
    decoder.hidden_size = config.model.projector_config.n_embed = 32
    decoder.intermediate_size = decoder.moe_intermediate_size = 32
    decoder.num_hidden_layers, decoder.n_routed_experts, decoder.num_experts_per_tok = 2, 4, 2
    decoder.kv_lora_rank, decoder.qk_nope_head_dim, decoder.qk_rope_head_dim = 8, 8, 8
    decoder.v_head_dim = 8
    config.model.vision_config.width = config.model.projector_config.input_dim = 16
    config.model.vision_config.layers = 1
    config.batch.rows, config.batch.tiles = 2, 16
    config.optim.warmup_steps, config.optim.lr, config.optim.algorithm = 2, 1e-3, "adamw"
    config.steps, config.eval.every, config.checkpoint.every = 6, 3, 2
    return config
