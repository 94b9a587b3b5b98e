"""Metrics of written texts: ROUGE, BLEU, chrF and exact match.

Citations such as W04-1013 are papers of aclanthology.org.
"""

from __future__ import annotations

from typing import ClassVar

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from shardtune.metrics.pairs import PairMetric


class Rouge(PairMetric):
    """F1 of shared words (rouge1), word pairs (rouge2), longest common subsequence (rougeL, rougeLsum), 0..1.

    Counted by rouge-score with the settings of the script `rouge` of `evaluate`: lower case, words of the
    characters a-z and 0-9 (a text in another script scores 0), no stemming. Each score is the plain mean over
    the pairs; that script's default, the median of 1,000 bootstrap samples, is random and lies beside it by a
    fraction of its sampling error.

    rougeL takes a text as one sequence. rougeLsum takes each line as a sentence and unites the subsequences
    that a reference sentence shares with the prediction's sentences, so it differs from rougeL only where a
    text has several lines. Texts are scored as they are: nothing splits a paragraph into sentences.
    """

    citation_text = "Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, W04-1013"
    names: ClassVar[tuple[str, ...]] = ("rouge1", "rouge2", "rougeL", "rougeLsum")

    def scores(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        """Mean F1 of each kind."""
        # A tokenizer of our own: the scorer logs a line when it makes the same one itself.
        scorer = RougeScorer(self.names, tokenizer=DefaultTokenizer(use_stemmer=False))
        sums = dict.fromkeys(self.names, 0.0)
        for prediction, reference in zip(predictions, references, strict=True):
            for name, value in scorer.score(reference, prediction).items():
                sums[name] += float(value.fmeasure)
        return {name: total / len(predictions) for name, total in sums.items()}


class Bleu(PairMetric):
    """BLEU of the whole corpus, 0..100, by sacrebleu with its defaults: 13a tokens, case kept, 1 to 4 words.

    Words are matched within a pair but counted over all of them. It is 0 where no text has four words.
    """

    citation_text = "Papineni et al. 2002, BLEU, P02-1040; Post 2018, sacrebleu, W18-6319"

    def scores(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        """Corpus BLEU."""
        # force: no warning when many lines end in a separate period.
        value = BLEU(force=True).corpus_score(predictions, [references]).score
        return {"bleu": min(float(value), 100.0)}  # a perfect score is 100 and some rounding error


class Chrf(PairMetric):
    """chrF2 of the whole corpus, 0..100, by sacrebleu with its defaults: 1 to 6 characters, no spaces."""

    citation_text = "Popović 2015, chrF: character n-gram F-score for automatic MT evaluation, W15-3049"

    def scores(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        """Corpus chrF2."""
        value = CHRF().corpus_score(predictions, [references]).score
        return {"chrf": min(float(value), 100.0)}


class ExactMatch(PairMetric):
    """Share of predictions equal to their reference, white space at both ends aside, 0..1."""

    citation_text = "Rajpurkar et al. 2016, SQuAD, arXiv:1606.05250 (without its other normalizations)"

    def scores(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        """Share of equal texts."""
        equal = [p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)]
        return {"exact_match": sum(equal) / len(equal)}
