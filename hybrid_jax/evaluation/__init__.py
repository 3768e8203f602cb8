"""Evaluation: perplexity by length, needles, associative recall, and the model in lm_eval."""

from hybrid_jax.evaluation.model_predictor import ModelPredictor
from hybrid_jax.evaluation.predictor import Predictor, Scored, score_answers

__all__ = ["ModelPredictor", "Predictor", "Scored", "score_answers"]
