"""What knows no grammar and no model: files, command lines, executors, text, words, means."""
