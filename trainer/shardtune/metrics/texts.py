"""Metrics of written texts: ROUGE, BLEU, chrF, exact match, length, and those of SQuAD.

Citations such as W04-1013 are papers of aclanthology.org.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

from shardtune.metrics.names import SCORES
from shardtune.metrics.summed import Floats, Mean, SummedMetric, ratio, rows


class Rouge(SummedMetric):
    """F1 of shared words (rouge1), word pairs (rouge2), longest common subsequence (rougeL, rougeLsum), 0..1.

    Counted by rouge-score with the settings of the script `rouge` of `evaluate`: lower case, words of the
    characters a-z and 0-9 (a text in another script scores 0), no stemming. Each score is the plain mean over
    the examples, of several references the best; that script's default, the median of 1,000 bootstrap samples, is
    random and lies beside it by a fraction of its sampling error.

    rougeL takes a text as one sequence. rougeLsum takes each line as a sentence and unites the subsequences
    that a reference sentence shares with the prediction's sentences, so it differs from rougeL only where a
    text has several lines. Texts are scored as they are: nothing splits a paragraph into sentences.
    """

    citation_text = "Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, W04-1013"
    names: ClassVar[tuple[str, ...]] = SCORES["rouge"]
    columns = 4

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        """The F1 of each kind, [n, 4]."""
        # A tokenizer of our own: the scorer logs a line when it makes the same one itself.
        scorer = RougeScorer(self.names, tokenizer=DefaultTokenizer(use_stemmer=False))
        found = [scorer.score_multi(right, p) for p, right in zip(predictions, references, strict=True)]
        return rows([[score[name].fmeasure for name in self.names] for score in found], self.columns)

    def values(self, sums: Floats, counts: Floats) -> dict[str, Floats]:
        """The mean of each kind."""
        return {name: ratio(sums[..., index], counts) for index, name in enumerate(self.names)}


class Bleu(SummedMetric):
    """BLEU of the whole corpus, 0..100, by sacrebleu's counts and its defaults: 13a tokens, case kept, 1 to 4 words.

    100 · min(1, exp(1 − R / P)) · (p₁ p₂ p₃ p₄)^¼, where P and R are the words of predictions and (of each example the
    nearest in length) references, and p_k is the share of the predictions' k-grams that a reference of the same example
    has; where none has, p_k is 1 / (2^z · their number) at the z-th such k. It is 0 where no text has four words or
    nothing matches.
    """

    citation_text = "Papineni et al. 2002, BLEU, P02-1040; Post 2018, sacrebleu, W18-6319"
    columns = 10

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        """Words of the prediction and of the reference, matching k-grams and all k-grams for k = 1..4: [n, 10]."""
        # effective_order: only the score of one sentence depends on it, of which nothing is taken but the counts.
        bleu = BLEU(effective_order=True)
        found = [bleu.sentence_score(p, right) for p, right in zip(predictions, references, strict=True)]
        # Both remember 65,536 lines for each process, which on long texts is all the memory of an evaluation.
        Tokenizer13a.__call__.cache_clear()
        TokenizerRegexp.__call__.cache_clear()
        return rows([[f.sys_len, f.ref_len, *f.counts, *f.totals] for f in found], self.columns)

    def values(self, sums: Floats, counts: Floats) -> dict[str, Floats]:
        """Corpus BLEU."""
        words, expected, matches, all_grams = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
        unmatched = matches == 0
        smoothing = np.exp2(np.cumsum(unmatched, -1))
        precision = ratio(np.where(unmatched, 1 / smoothing, matches), all_grams)
        scored = (precision > 0).all(-1) & ~unmatched.all(-1)
        logs = np.log(np.where(scored[..., None], precision, 1.0)).mean(-1)
        brevity = np.minimum(0.0, 1 - ratio(expected, words))
        return {"bleu": np.minimum(100.0, np.where(scored, 100 * np.exp(brevity + logs), 0.0))}


class Chrf(SummedMetric):
    """chrF2 of the whole corpus, 0..100, by sacrebleu's counts and its defaults: 1 to 6 characters, no spaces.

    100 · 5 p r / (4 p + r), where p and r are the means, over the k of 1 to 6 for which both sides have k-grams, of the
    share of the predictions' k-grams that the reference has, and the other way round; of several references the one
    that matches best.
    """

    citation_text = "Popović 2015, chrF: character n-gram F-score for automatic MT evaluation, W15-3049"
    columns = 18

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        """k-grams of the prediction, of the reference, and common ones, for k = 1..6: [n, 18]."""
        chrf: Any = CHRF()
        # sacrebleu has no public function that gives these counts; they are those that its own bootstrap resamples.
        found = [
            chrf._extract_corpus_statistics([p], [[text] for text in right])[0]
            for p, right in zip(predictions, references, strict=True)
        ]
        return rows(found, self.columns)

    def values(self, sums: Floats, counts: Floats) -> dict[str, Floats]:
        """Corpus chrF2."""
        predicted, expected, common = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
        orders = ((predicted > 0) & (expected > 0)).sum(-1)
        precision = ratio(ratio(common, predicted).sum(-1), orders)
        recall = ratio(ratio(common, expected).sum(-1), orders)
        return {"chrf": np.minimum(100.0, 100 * ratio(5 * precision * recall, 4 * precision + recall))}


class ExactMatch(Mean):
    """Share of predictions equal to a reference, white space at both ends aside, 0..1."""

    citation_text = "Rajpurkar et al. 2016, SQuAD, arXiv:1606.05250 (without its other normalizations)"
    score = "exact_match"

    def of(self, prediction: str, references: Sequence[str]) -> float:
        """1 or 0."""
        return float(prediction.strip() in [text.strip() for text in references])


class Length(Mean):
    """Average number of words of the predictions, words being what white space separates. Not good or bad by itself."""

    citation_text = "None: a count"
    score = "length"

    def of(self, prediction: str, references: Sequence[str]) -> float:
        """Words of the prediction."""
        return float(len(prediction.split()))


_SQUAD = "Rajpurkar et al. 2016, SQuAD, arXiv:1606.05250; of no answer Rajpurkar et al. 2018, arXiv:1806.03822"
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_words(text: str) -> list[str]:
    """The words that SQuAD's metrics compare: lower case, without the punctuation of ASCII and without a, an, the."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


class SquadEm(Mean):
    """Share of predictions equal to a reference, 0..1, as SQuAD compares them: lower case, without the punctuation of
    ASCII, without the words a, an and the, and with single spaces."""

    citation_text = _SQUAD
    score = "squad_em"

    def of(self, prediction: str, references: Sequence[str]) -> float:
        """1 or 0."""
        return float(squad_words(prediction) in [squad_words(text) for text in references])


class TokenF1(Mean):
    """Mean F1 of the words that prediction and reference share, as bags, 0..1; of several references the best.

    2 · shared / (words of the prediction + words of the reference), after SQuAD's normalization: lower case, without
    the punctuation of ASCII, without the words a, an and the. Two empty texts have 1, an empty one and another 0.
    """

    citation_text = _SQUAD
    score = "token_f1"

    def of(self, prediction: str, references: Sequence[str]) -> float:
        """The best F1."""
        words = Counter(squad_words(prediction))
        return max(_bag_f1(words, Counter(squad_words(text))) for text in references)


def _bag_f1(one: Counter[str], other: Counter[str]) -> float:
    both = one.total() + other.total()
    return 2 * (one & other).total() / both if both else 1.0
