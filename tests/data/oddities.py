"""Bytes that a tokenizer must give back as they were."""

ODDITIES = [
  b"tab\tnewline\ncarriage\r\nreturn\r  two  spaces   ",
  "caf\u00e9 \u4e2d\u6587 \U0001f600\U0001f468\u200d\U0001f469 \u2581literal\u2581 \u2585".encode(),
  "\ufeff\ufffd\u2028".encode(),
  b"\x00nul\x00\x00",
  b"latin1 \xe9\xe8 broken \xed\xa0\x80 \xf0\x9f\x98 tail\xff",
  b"<s></s><unk><pad><0x41> <|endoftext|>",
]
