"""The main job: train an embedding on drawings of Han characters, retrieve characters never seen before."""
