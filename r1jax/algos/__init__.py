"""What is optimised: advantages, losses, KL estimates, weights and choice of tokens, on arrays."""
