"""The compiled forward pass: a token's way through it, its words, and how weights lie in memory.

**A token's way.** `forward.run` is one compiled function; Python fills in the structs before it
(`workspace.py`) and reads the logits after it.

    layout.py                            STATE and PRODUCT: the structs that all kernels read
    forward.py      embed                id -> x
                    block                the order of a block; each of its lines is a stage, run by
      share.py        run_stage          on one thread or several, part by part:
      stages.py       attention_in       x -> norm -> codes
                      rows               q, k, v                           products/rows.py
                      store              RoPE on keys; into the cache      attention/attend.py
                      attend_part        scores, softmax, values           attention/attend, int8
                      out_in, rows       sub-norm -> codes; o
                      ffn_in, rows       x + o, norm -> codes; gate, up
                      down_in, rows      activation, sub-norm -> codes; down
                      block_out          + x
                    exit_logits          exit_in (final norm), rows (vocabulary)
                    contending_logits    a head in two parts (SPEC 9.6)    contenders.py
                    look                 blocks of tokens that leave where gates say so (SPEC 8.3)
                    go_on                another token in the same call    choice.py
                    draft                SPEC 11.1
                    measure              gates, confidence, leads          measures.py

    products/       rows                 sums -> floats, scaled; asks the path's module for sums
                    simd, amx, plain     how many tokens go to which kernel (`isa.Path.kernels`)
                    ternary_layout, vocab_layout, repack, transpose     how weights lie
                    ternary_simd, vocab_simd, dot                       kernels, their instruction
                    float_simd                                          rows of floats, their trees
    attention/      attend, passes       one token's heads; the loops over cached keys and values
                    int8, int8_passes    the same over codes (SPEC 6.8)
    arithmetic/     elementwise, exponential, float16, lanes            SPEC 2 to 5, 6.5, 8.5
    numba_inside/   decorators, pieces, emit, views, atomics     what touches the insides of Numba
    parts.py        how a product is cut into parts
    object_code.py  what is compiled: `run`, `repack`, and the pieces that `run` calls

**Where weights lie.** Sixteen rows of a matrix are a tile, whose bytes follow each other:

    rows  0..15    | unit | unit | ... | tail |      unit: 4 lines that are read together; dense: 5
    rows 16..31    | unit | unit | ... | tail |            that hold 8, or 2 that hold 3; tail:
                                                           single lines

    a line         | row 0   | row 1   | ... | row 15  |        64 bytes, 4 of each row
                   | a b c d | a b c d | ... | a b c d |

    a byte         plane 3 | plane 2 | plane 1 | plane 0        2 bits each; dense: 3 planes as
                                                                digits of a number to 26, in 5 bits,
                                                                of a byte or of a word (2 columns)

Plane p of a line is columns 4p .. 4p + 3 of the line's 16 columns (dense: 12). Multiplied with the
4 activation codes of these columns it adds to the sums of 16 rows, a lane each; nothing is ever
added across lanes. A tile is unpacked by writing every plane as a line of its own. Rows of the
vocabulary lie in such tiles, too; their units have 16 columns.

**Words.** One meaning each:

    acc             int32 sums of code products, before they become floats
    band            BAND rows of a product, whose sums are converted together: four tiles
    branch, leaf    of the tree that adds features (SPEC 2.2): a branch has 8 or 64 leaves
    chain           one of several accumulators of a sum, so that additions need not wait
    chunk           up to CHUNK tokens that go through the blocks together
    codes           a token's quantized input, int8; a weight's stored w + 1
    contender       a row of the vocabulary whose logit may be chosen (SPEC 9.6)
    group           LEAVES registers of a row that its tree adds up first (float_simd.py)
    head            an attention head; the vocabulary's matrix is always `vocab`
    input           a token's floats before they become codes
    lane            one of the numbers that an instruction works on; LANES = 16 floats
    page            LANES neighbouring cached positions, of all blocks and key-value heads
    panel           tiles x tokens that a kernel multiplies at a time once tiles are unpacked
    part            what one thread does of a stage without asking; of a product a run of
                    rows, or two, one of each half (`isa.Fetch.halves`)
    path            an instruction set (`isa.Path`)
    piece           units of a tile that a matrix unit takes at a time (amx.py)
    product         all rows of q|k|v, of o, gate|up, down, or of the vocabulary
    room            scratch for unpacked tiles
    row             a matrix's row: one output of a product
    stage           a step of a block that threads share; `step` itself is a quantizer's (SPEC 4.2)
    tile, line, plane, unit, tail       see above
"""
