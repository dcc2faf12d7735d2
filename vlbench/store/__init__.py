"""What is kept on disk: results, the rows behind them, features. Numpy and pyarrow; never torch."""
