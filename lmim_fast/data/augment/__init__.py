"""The augmentation of fine-tuning crops: what is drawn for an image, and the program that makes its view."""
