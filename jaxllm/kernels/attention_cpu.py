"""placeholder"""
def attention_cpu(query, key, value, *, causal, window, segment_ids, scale):
  from jaxllm.kernels import flash_attention as fa
  return fa.flash_attention(query, key, value, visibility=fa.Visibility(causal=causal, window=window), segment_ids=segment_ids, scale=scale, backend="xla")
