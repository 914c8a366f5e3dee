// Floor 0, includes rows.h: the level of every processor.
#include "rows.h"

namespace efficientad {

extern const Level kPortable = {"portable",  columns_loop, pixels_loop,
                                pack_loop,   blend_loop,   overlay_loop};

}  // namespace efficientad
