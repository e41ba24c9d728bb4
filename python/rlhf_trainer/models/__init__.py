"""Loading models, adapters and precision; forward passes without logits."""
