"""An executor that waits between the first layer of a step that sends pages and the second, for as
long as there is the file that WAIT_FILE names."""

import os
import time

from jpd.semi_pd import worker
from jpd.semi_pd.page_push import PushProgress


def main():
    filled = PushProgress.filled

    def wait(value):
        while os.path.exists(os.environ["WAIT_FILE"]):
            time.sleep(0.001)
        return value

    def filled_and_wait(self, layer, following, keys, values):
        import jax

        following = filled(self, layer, following, keys, values)
        if layer > 0:
            return following
        return jax.pure_callback(wait, jax.typeof(following), following)

    PushProgress.filled = filled_and_wait
    worker._main()


if __name__ == "__main__":
    main()
