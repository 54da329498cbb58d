"""In-tool and in-weight learning: the experiments of arXiv 2508.20755, from facts to figures."""
