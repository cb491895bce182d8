"""What the paper claims figure by figure, in our words, and what stands for it in the miniature world."""

from dataclasses import dataclass

HEAD = """\
# The paper in miniature

Written by `paper.py`; settings were fixed before the first run and nothing was chosen by an examination, but for the
learning rate of on-policy distillation, see there. Students C follow the recipe of level C of
[RESULTS.md](RESULTS.md) (they saw the teacher's style in 2% of what they learned from), in a run of its own:
three seeds, 500 rows a set, 9 epochs (144 steps), examined on 400 `calc` prompts (in-domain) and 200 of each other
family (out-of-domain) that no row was written for. Figures after ± are standard deviations over the students.

**How it is judged.** The differences that a claim is about are taken student by student. Where each mean is above
its deviation, it *agrees*; where one is below minus its deviation, it *does not agree*; else it *cannot be judged
here*. Three students of 0.4 million parameters say something of the method's mechanics, little of models of 8
billion. Table 1 is in [RESULTS.md](RESULTS.md); figures 1 and 2 are illustrations, table 2 is a prompt and tables 3
to 5 are examples of outputs, so nothing of them was run.

Added after the first version of this page, its figures being known: figure 9's students, five sets of RSR, the last
pairs of figures 6 and 10, and the on-policy start on the teacher's rows."""


@dataclass(frozen=True)
class Claim:
    """A claim, and what is compared for it."""

    title: str
    paper: str
    """The claim, with the paper's figures."""
    here: str
    """What stands for it in miniature."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Conditions of which the first is to be above the second in-domain; an empty one is no change."""
    absolute: bool = False
    """Whether right answers are compared, not changes."""


TESSY, TEACHER = "C: tessy", "C: teacher-only"
ALONE = "C: on-policy alone"
RULES = ("every-5", "entropy", "student-accepts", "likeliest")

CLAIMS = {
    "figure 6": Claim(
        "quality of the data by length limit",
        "Rows of tessy are right more often than the teacher's own where both are limited to 40K tokens (+10.99 "
        "points on OJBench), and than the teacher's at 48K (+6.04); at 64K the teacher just passes them.",
        "right rows among 500, had the thinking been limited to so many tokens. The teacher's phrases are longer "
        "than the student's by construction, so what is tested is that shorter rows lose nothing. That the teacher "
        "passes tessy is judged where both have the largest limit; there nearly all rows of both are right.",
    ),
    "figure 12": Claim(
        "lengths",
        "Rows of tessy are shorter than the teacher's by 7,594, 8,938 and 2,816 tokens for three teachers, and "
        "shorter than the student's own.",
        "mean tokens of a row, in the student's tokens.",
    ),
    "figures 16, 17": Claim(
        "frequent words, and who wrote the tokens",
        "Models differ in their frequent words; under tessy the teacher writes 77.65% of the tokens (GPT-OSS-120B).",
        "the most typical words of each set (first student), and the teacher's share. In this world a piece of "
        "style is about as long as a step.",
    ),
    "figure 11": Claim(
        "over the epochs",
        "After a dip at first, tessy's student recovers by the third epoch and gains until the eighth or ninth.",
        "right answers on a third of the in-domain prompts, before and after some epochs. The dip is not part of the "
        "verdict.",
    ),
    "figure 7": Claim(
        "base against reasoning student",
        "Both kinds of data improve the base model, tessy more (+0.43 and +7.09 points over teacher-only), yet it"
        " stays behind the reasoning model untrained (10.99) and trained on tessy (17.67).",
        "`base` is a student that was stopped after a quarter of its steps. Rows are written with it, or by the "
        "teacher.",
        (
            ("base: tessy", "base: none"),
            ("base: tessy", "base: teacher-only"),
            ("C: none", "base: tessy"),
            (TESSY, "base: tessy"),
        ),
        absolute=True,
    ),
    "figure 15": Claim(
        "training loss",
        "The loss on tessy's rows is lower than on the teacher's, for base and reasoning models, and lower for "
        "reasoning models than for base ones.",
        "means over the epochs.",
        (
            (TEACHER, TESSY),
            ("base: teacher-only", "base: tessy"),
            ("base: tessy", TESSY),
            ("base: teacher-only", TEACHER),
        ),
    ),
    "rules": Claim(
        "other rules of who writes next (not in the paper)",
        "Boundary predictors decide. Others hand over by the student's entropy, by whether it accepts the "
        "teacher's words, or by its likelihood of candidates; `every` is the control.",
        "`every: 5` words; `entropy` above 1.0; `student-accepts` words of at least 0.1; `likeliest` of 4 "
        "candidates of 5 words. The pairs ask whether tessy with predictors is above each.",
        tuple((TESSY, f"C: {rule}") for rule in RULES),
    ),
    "figure 10": Claim(
        "isolation by a system prompt",
        "A system prompt for the teacher's rows helps a little (+2.55 and +5.28 points) but leaves the student "
        "below where it was (-0.70 and -4.74) and far below tessy.",
        "the system prompt `mode 2 .` in training and examination.",
        (
            ("C: teacher-only, system prompt", TEACHER),
            (TESSY, "C: teacher-only, system prompt"),
            ("", "C: teacher-only, system prompt"),
        ),
    ),
    "figure 13": Claim(
        "LoRA",
        "LoRA (rank 8, alpha 16) does much worse than training all parameters, and below the untrained student.",
        "the same rank, alpha, epochs and learning rate as for all parameters.",
        ((TESSY, f"{TESSY}, LoRA"), (TEACHER, f"{TEACHER}, LoRA"), ("", f"{TESSY}, LoRA")),
    ),
    "best-of-n": Claim(
        "tessy with rejection sampling (not in the paper)",
        "Expected only: techniques that raise the quality of rows should help further once the distributions match.",
        "the first of at most 5 candidates that the verifier finds right.",
        (("C: tessy-best-of-5", TESSY),),
    ),
    "figure 9": Claim(
        "who writes the answer",
        "Answers of the teacher cost 12.33 and 13.58 points against the student's, and are still 2.26 and 3.12 "
        "above teacher-only.",
        "the same rows as tessy's up to the end of the thinking.",
        ((TESSY, "C: tessy-teacher-answer"), ("C: tessy-teacher-answer", TEACHER)),
    ),
    "RSR": Claim(
        "Rank-Surprisal Ratio (not in the paper)",
        "arXiv 2601.14249 finds that a low ratio goes with what students learn (Spearman 0.86 in size).",
        "mean ratio of the first 100 rows under the student, against its change in-domain. Changes of the five sets "
        "that were not trained on again (student-only, best-of-5, teacher-mix, teacher-answer, teacher-think) are "
        "from [RESULTS.md](RESULTS.md), of that run's students; all ratios are of this run's. Left out: sets of the "
        "base and the large students, whose ratios and changes are of other models; teacher-reference, which was not "
        "written again (27% of its rows ended, 1% were right, see RESULTS.md); teacher-score, whose rows are "
        "student-only's, word for word. At least 98% of the rows of tessy-related, tessy-other and tessy-best-of-5 "
        "are tessy's, word for word, and at least 90% of teacher-think's are teacher-only's, so six points are not "
        "much more than two. The first version of this page had 13 sets, with +0.26. A correlation of -0.5 or less "
        "agrees, of 0 or more does not.",
    ),
    "figures 8, 14": Claim(
        "distribution of the data",
        "Rows of tessy are nearer to the student's than the teacher's are: similarities rise from 0.899, 0.846 "
        "and 0.849 to 0.971, 0.960 and 0.898.",
        "cosines of TF-IDF vectors, three teachers; principal components of the first student's sets. `related` "
        "shares the student's vocabulary, format and half of its phrases; `other` has a third style.",
    ),
    "on-policy": Claim(
        "tessy as a cold start of on-policy distillation (not in the paper)",
        "arXiv 2604.13016: on-policy distillation needs compatible thinking patterns; a start on given texts "
        "repairs runs that fail.",
        "TRL's DistillationTrainer with the `related` teacher, which shares the vocabulary as it must; 144 steps "
        "alone, or 72 after 72 steps on 250 rows of tessy or of the teacher; against 144 steps on 500 rows of tessy "
        "with that teacher. The learning rate, 3e-5, was chosen after a first run, on prompts that nothing else is "
        "examined on: with fine-tuning's 3e-4 hardly any answer stayed right in any seed (-54 points alone, -55 "
        "after tessy), nor, tried with one seed, at 1e-4 with beta 0, 0.5 or 1, or at 3e-5 with beta 0; 3e-5 with "
        "beta 0.5 did as well as with 1, TRL's default. What broke was the answer, not the thinking: the teacher "
        "words it otherwise, gives the student's words no probability, and is at a loss after them. At 3e-5 the "
        "student keeps nearly all of its answers alone and after tessy, but distillation adds none; after the "
        "teacher's rows its texts grow longer within a few steps, and most right answers go. More steps than "
        "fine-tuning takes were not tried.",
        (
            ("C: tessy-related, then on-policy", ALONE),
            ("C: teacher-only-related, then on-policy", ALONE),
            ("C: tessy-related, then on-policy", "C: tessy-related"),
        ),
    ),
    "figure 5": Claim(
        "three teachers",
        "tessy is above teacher-only with each: by 1.07 points with a teacher of the student's family, 3.45 and "
        "16.79 with others.",
        "the shipped teacher, `related` and `other`. Students saw 2% of the shipped teacher's style and nothing of "
        "the other two. What a teacher adds to tessy's rows is the same with each: at least 98% of those with the "
        "other two are, word for word, those with the shipped one, so what differs is teacher-only.",
        tuple((f"C: tessy{teacher}", f"C: teacher-only{teacher}") for teacher in ("", "-related", "-other")),
    ),
    "figure 3": Claim(
        "a larger student",
        "Qwen3-30B-A3B gains 6.37 and 10.13 points from tessy, 5.52 and 8.41 more than from teacher-only.",
        "`large` has 1.7 times the parameters and prefers other phrases.",
        (("large: tessy", ""), ("large: tessy", "large: teacher-only")),
    ),
    "figure 4": Claim(
        "students crossed in synthesis and training",
        "Rows that were written with the other student of the same family teach less: -1.94 points for the small "
        "one, -2.8 for the large one.",
        "the two students have the same phrases with opposite frequencies.",
        ((TESSY, "C: tessy-of-large"), ("large: tessy", "large: tessy-of-C")),
    ),
}
