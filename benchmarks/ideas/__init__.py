"""Ideas that might store better tokens than the router `residual` does, a plug-in each, one a file.

python -m recipes compare --data rewrite --contestants benchmarks/ideas/contestants.yaml
python -m recipes fit --mixer ham --router benchmarks.ideas.correction.Correction
python -m recipes fit --mixer ham --router correction --plugin benchmarks/ideas/correction.py
"""
