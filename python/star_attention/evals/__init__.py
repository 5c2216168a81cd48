"""Accuracy benchmarks: RULER, BABILong, InfiniteBench, AA-LCR and the user's own questions.

ruler.py, babilong.py, infinitebench.py, aa_lcr.py, custom.py
                  what is asked: tasks that make samples
sample.py, maker.py
                  a sample, a task, and how a generated sample gets its length
prompts.py, texts.py, metrics.py, named.py
                  chat template and token counts; haystack text and words; scorers
runner.py         methods (dense, ring, star with its sizes) and how they answer samples
results.py        the results folder: predictions and scores, resumable
report.py, plots.py, tune.py
                  what the results say
"""
