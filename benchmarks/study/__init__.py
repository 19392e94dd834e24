"""What each method learns of the same real data: ``python -m benchmarks.study --data DIRECTORY``.

SmolLM2-135M-Instruct, quantised where the method quantises, on five tasks: SST-2 and RTE as text
with a one-word answer (accuracy), WikiText-2 (perplexity), and Alpaca behind a plain "Response:"
and in the model's own chat template (loss of the responses). All methods see the same rows in the
same order. Each run is one line of results/study.jsonl, so that a study that was cut short goes on
where it stopped, and its page is drawn from that file alone. All of it takes half a day on two
cores; ``--quick`` takes half an hour; with ``--device cuda`` a run takes seconds.

The depth dial is ``--methods dial,dial_nf4,dial_nf4_rank_32``: at equal tokens, with ``--match
time`` at equal time, with ``--rows 256 --states DIRECTORY`` on few rows whose frozen states are
kept; ``--tune`` tunes each rate, and ``--costs 5`` measures time and memory of a step.
Processes with different ``--tasks`` can run side by side.

DIRECTORY has ``sst2/{train_sentences,dev}.jsonl`` (sentence, label 0 or 1),
``rte/{train,dev}.jsonl`` (sentence1, sentence2, label entailment or not_entailment),
``wikitext2/{train,test}.raw`` and ``alpaca/{train,heldout}.jsonl`` (instruction, input, output).
"""
