"""The main job: train an embedding on drawings of Han characters, and retrieve characters never seen before."""
