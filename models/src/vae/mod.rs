//! Autoencoders of images: to a distribution of latents (KL), to a list of codes (VQ), and plain.
