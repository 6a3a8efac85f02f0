"""Operations on quantized weights and codebooks."""
