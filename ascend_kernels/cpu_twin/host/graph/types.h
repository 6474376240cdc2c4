// Stand-in for the header of this name in CANN.
#pragma once

#include "twin_host/types.h"
