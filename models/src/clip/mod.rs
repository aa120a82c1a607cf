//! CLIP: a text tower and an image tower that agree on what belongs together.
