"""A worker on whose second rank some folders cannot be read, as when a disk is not shared."""

from phatgoose.serve.worker import Worker


class HalfBlind(Worker):
    def phatgoose_prepare(self, name, source):
        missing = self.rank == 1 and name.endswith("-on-one-disk")
        return super().phatgoose_prepare(name, source + "-missing" if missing else source)
