/* Rows of a stream put in their places in one pass over them: following.py calls this on the memory of
 * tensors. Compiled like qp/dual.c. */

#include <stdint.h>
#include <string.h>

typedef int64_t i64;
typedef enum { FLOAT64, FLOAT32, BFLOAT16, FLOAT16 } Kind;

/* Whether a row has a number that is none, or infinite (2), or differs from another row (1); zeros of
 * either sign are equal. Without branches, so that many numbers are looked at together. */
#define LOOK(name, bits, exponent)                                                         \
    static int name(const bits *row, const bits *other, i64 width) {                       \
        const bits all = (bits)-1, unsigned_ = (bits)(all >> 1);                           \
        bits broken = 0, differs = 0;                                                      \
        for (i64 j = 0; j < width; j++) {                                                  \
            broken |= (bits)((row[j] & (exponent)) == (exponent));                         \
            differs |= (bits)(((row[j] | other[j]) & unsigned_) != 0 && row[j] != other[j]); \
        }                                                                                  \
        return (broken ? 2 : 0) | (differs ? 1 : 0);                                       \
    }
LOOK(look_double, uint64_t, 0x7ff0000000000000u)
LOOK(look_single, uint32_t, 0x7f800000u)
LOOK(look_brain, uint16_t, 0x7f80u)
LOOK(look_half, uint16_t, 0x7c00u)

/* The same where the stream is a base and what is written: the row differs from their sum, and what is
 * to be written of it is the row less the base, each rounded once as torch does. */
#define LEAVE(name, number)                                                                           \
    static int name(const number *row, const number *base, const number *held, number *into, i64 d) { \
        int broken = 0, differs = 0;                                                                  \
        for (i64 j = 0; j < d; j++) {                                                                 \
            broken |= !(row[j] - row[j] == 0);                                                        \
            differs |= row[j] != base[j] + held[j];                                                   \
        }                                                                                             \
        for (i64 j = 0; differs && j < d; j++) into[j] = row[j] - base[j];                    \
        return (broken ? 2 : 0) | (differs ? 1 : 0);                                                  \
    }
LEAVE(leave_double, double)
LEAVE(leave_single, float)

/* The stream (R, d) with rows (N, d) in their places (N), or in order where there are none; with a base
 * (R, d) beside the stream what is written of the rows. Returns 0 where none differs from what is there,
 * 1 where the result is to be taken, and below 0 where a number is not finite or a place is none: then
 * the result is not to be used. */
i64 lrqp_put_rows(const void *stream, const void *base, void *result, const void *rows, const i64 *place,
                  i64 count, i64 all, i64 width, i64 kind, i64 copies) {
    i64 size = width * (kind == FLOAT64 ? 8 : kind == FLOAT32 ? 4 : 2);
    int seen = 0;
    if (base && kind != FLOAT64 && kind != FLOAT32) return -2;
    if (base && copies) memcpy(result, stream, all * size);
    for (i64 b = 0; b < count; b++) {
        i64 at = place ? place[b] : b;
        if (at < 0 || at >= all) return -2;
        const void *row = (const char *)rows + b * size, *held = (const char *)stream + at * size;
        if (base) {
            const void *under = (const char *)base + at * size;
            void *into = (char *)result + at * size;
            seen |= kind == FLOAT64 ? leave_double(row, under, held, into, width)
                                    : leave_single(row, under, held, into, width);
            continue;
        }
        if (kind == FLOAT64) seen |= look_double(row, held, width);
        if (kind == FLOAT32) seen |= look_single(row, held, width);
        if (kind == BFLOAT16) seen |= look_brain(row, held, width);
        if (kind == FLOAT16) seen |= look_half(row, held, width);
    }
    if (seen != 1) return seen ? -1 : 0;
    if (base) return 1;
    if (copies) memcpy(result, stream, all * size);
    for (i64 b = 0; b < count; b++)
        memcpy((char *)result + (place ? place[b] : b) * size, (const char *)rows + b * size, size);
    return 1;
}
