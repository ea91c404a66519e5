"""Re-train GPT-Neo-125M-Code-Clippy: from a folder of source code to a trained, exported, talking model."""

__version__ = "0.2.0"
