"""The foundation of all other rooms: errors, paths, settings, files, locks, the store of finished work, processes.

Any room may import it, and it imports none.
To add to it, write a module that does not depend on models, images or rows.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
