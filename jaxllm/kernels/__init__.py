"""The hot path: one public function per kernel, each with named backends."""
