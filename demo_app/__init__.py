"""The Gradio door to uplift_core: components <-> core calls, limits, one queue. ``python demo.py`` opens it."""
