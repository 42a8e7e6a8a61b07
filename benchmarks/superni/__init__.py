"""SmolLM2-135M on Super-NaturalInstructions: the experiment of `docs/experiments/smollm2-superni.md`."""
